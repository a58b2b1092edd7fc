-- The level in force of every (user, item) that has one, and `n`, the event that decided it. Explicit beats
-- implicit; of explicit ones the latest wins; of implicit ones the strongest (liked, disliked, neutral), and
-- of equals the latest. One number orders them: the strength, then `n`.
-- `place` numbers the user's items of one level from 1 in order of `n`.
create or replace temp table in_force as
with telling as (
    select
        u, i, n, level,
        (case when explicit then 3 when level = 1 then 2 when level = -1 then 1 else 0 end::bigint << 40) + n as weight
    from events
    where level is not null and not impression and not served
    union all
    select u, i, n, level, (case level when 1 then 2 when -1 then 1 else 0 end::bigint << 40) + n as weight
    from events
    semi join unanswered using (u, n)
),
decided as (
    select u, i, arg_max(level, weight) as level, arg_max(n, weight) as n
    from telling
    group by u, i
)
select
    decided.u, decided.i, decided.level, decided.n,
    events.seq, events.q, events.occurred_at, events.arrived_at,
    row_number() over (partition by decided.u, decided.level order by decided.n) as place
from decided
join events using (u, n)
