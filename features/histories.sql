-- Each user's distinct engaged items, every one at its latest occurrence, oldest first, with its level in
-- force: all of them, or the last `length` among the last `look_back` engaged events.
with taken as (
    select u, i, n, occurred_at, row_number() over (partition by u order by n desc) as recency
    from events
    where engaged and ($before::timestamptz is null or occurred_at < $before::timestamptz)
),
latest as (
    select u, i, max(n) as n, arg_max(occurred_at, n) as occurred_at
    from taken
    where $look_back::bigint is null or recency <= $look_back::bigint
    group by u, i
    qualify $length::bigint is null or row_number() over (partition by u order by max(n) desc) <= $length::bigint
)
select
    users.user_id,
    list(latest.i order by latest.n) as item_ids,
    list(latest.occurred_at order by latest.n) as times,
    list(in_force.level order by latest.n) as levels
from latest
join users using (u)
left join in_force on in_force.u = latest.u and in_force.i = latest.i
group by users.user_id
order by users.user_id
