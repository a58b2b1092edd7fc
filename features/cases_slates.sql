-- Slates to judge a policy by: served after `since`, with at least one liked and one other item by the level
-- in force. Items without a level (never seen, or still open) are left out.
create or replace temp table asks as
with judged as (
    select
        slate_items.u, slate_items.q,
        list(slate_items.i order by slate_items.i) as shown,
        list(in_force.level order by slate_items.i) as levels,
        any_value(slate_items.policy_version) as policy_version,
        bool_or(slate_items.propensity is not null) as sampled
    from slate_items
    join in_force using (u, i)
    group by slate_items.u, slate_items.q
    having bool_or(in_force.level = 1) and bool_or(in_force.level <> 1)
)
select judged.*, shown as excluded, slates.asked_at, slates.asked_seq
from judged
join slates using (u, q)
where $since::timestamptz is null or slates.arrived_at > $since::timestamptz
qualify row_number() over (partition by judged.u order by slates.asked_seq desc) <= $cap
