-- Sampled slates whose outcome is known: every item served with a propensity, the window of the slate closed
-- against the watermark. `met`: what the user had met (any event but `served`) when the slate was asked for.
create or replace temp table asks as
with places as (
    select users.u, requests.q, items.i, min(logged.position) as position
    from logged
    join users using (user_id)
    join items using (item_id)
    join requests using (request_id)
    where logged.kind = 'served' and logged.position is not null
    group by users.u, requests.q, items.i
),
sampled as (
    select
        slate_items.u, slate_items.q,
        list(slate_items.i order by places.position) as shown,
        list(slate_items.propensity order by places.position) as propensities,
        list(coalesce(in_force.level, 0) = 1 order by places.position) as liked,
        any_value(slate_items.policy_version) as policy_version
    from slate_items
    join places using (u, q, i)
    left join in_force using (u, i)
    group by slate_items.u, slate_items.q
    having bool_and(slate_items.propensity > 0)
),
recent as (
    select sampled.*, slates.asked_at, slates.asked_seq
    from sampled
    join slates using (u, q)
    where slates.arrived_at + to_microseconds($window_us) <= $watermark::timestamptz
        and ($since::timestamptz is null or slates.arrived_at > $since::timestamptz)
    qualify row_number() over (partition by sampled.u order by slates.asked_seq desc) <= $cap
),
met as (
    select recent.u, recent.q, list(distinct events.i) as met
    from recent
    join events on events.u = recent.u and events.seq < recent.asked_seq and not events.served
    group by recent.u, recent.q
)
select recent.*, coalesce(met.met, []) as met, recent.shown as excluded
from recent
left join met using (u, q)
