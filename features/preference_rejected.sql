-- What one stage asks of the policy: every like of the window that has something to reject. Rejected are
-- items whose level in force is `level`: those of the same slate first, then the user's latest ones before
-- the like. Of a user's likes in the window (`preferred` above 0) at most `cap`, those with the greatest
-- `preferred`; `available` says how many there were. Of those from before it at most `replay_cap`.
create or replace temp table asks as
with numbered as (
    -- how many items had this level before the like
    select likes.*, coalesce(before.place, 0) as earlier
    from likes
    asof left join (select u, n, place from in_force where level = $level) as before
        on before.u = likes.u and before.n < likes.n
),
candidates as (
    select
        numbered.*,
        coalesce(slate_negatives.entries, []) as same_slate,
        -- the last block is used up to the like, the one before it is whole: never fewer than can be rejected
        list_reverse(list_concat(
            coalesce(previous.entries, []),
            coalesce(latest.entries[:earlier - latest.block * $max_rejected], [])
        )) as latest_first
    from numbered
    left join slate_negatives
        on slate_negatives.u = numbered.u and slate_negatives.q = numbered.q and slate_negatives.level = $level
    left join negatives as latest
        on latest.u = numbered.u and latest.level = $level
        and latest.block = (earlier - 1) // $max_rejected and earlier > 0
    left join negatives as previous
        on previous.u = numbered.u and previous.level = $level
        and previous.block = (earlier - 1) // $max_rejected - 1
),
usable as (
    select
        *,
        count(*) filter (where preferred > 0) over (partition by u) as available,
        row_number() over (partition by u order by preferred desc) as choice
    from candidates
    where len(same_slate) > 0 or len(latest_first) > 0
)
select
    * exclude (same_slate, latest_first, earlier, choice),
    choice = 1 as first_of_user,
    list_concat(
        same_slate,
        list_filter(latest_first, lambda x: not list_contains(same_slate, x))
    )[:$max_rejected] as rejected,
    list_append(rejected, i) as excluded
from usable
where choice <= case when preferred > 0 then $cap else available + $replay_cap end
