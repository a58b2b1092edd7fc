-- Every (user, item) whose level in force is liked and whose like arrived inside the window, with the moment
-- it was asked for. A like belongs to the request it names, else to that of the user's last impression of the
-- item within the attribution window before it. Where that slate's served record is known, its request is
-- the moment (both clocks); otherwise the user's first event on the item is, by the time it occurred.
create or replace temp table likes as
with liked as (
    select * from in_force where level = 1 and ($since::timestamptz is null or arrived_at > $since::timestamptz)
),
shown as (
    select liked.u, liked.i, arg_max(events.q, events.n) as q
    from liked
    join events using (u, i)
    where liked.q is null
        and events.impression
        and events.q is not null
        and events.occurred_at between liked.occurred_at - to_microseconds($window_us) and liked.occurred_at
    group by liked.u, liked.i
),
first_met as (
    select u, i, min(occurred_at) as asked_at
    from events
    semi join liked using (u, i)
    group by u, i
),
attributed as (
    select liked.* exclude (q), coalesce(liked.q, shown.q) as q
    from liked
    left join shown using (u, i)
)
select
    attributed.u, attributed.i, attributed.q, attributed.n,
    slate_items.q is not null as on_slate,
    slate_items.policy_version,
    slate_items.propensity,
    case when on_slate then slates.asked_at else first_met.asked_at end as asked_at,
    -- null: no landing clock to respect
    case when on_slate then slates.asked_seq end as asked_seq,
    -- which of a user's likes a cap keeps: the latest, unless preference_preferred.sql says otherwise
    attributed.n as preferred
from attributed
join first_met using (u, i)
left join slate_items on slate_items.u = attributed.u and slate_items.q = attributed.q
    and slate_items.i = attributed.i
left join slates on slates.u = attributed.u and slates.q = attributed.q
