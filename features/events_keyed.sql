-- The log with numbers for ids and only what queries need. Events whose request id was not ours are left
-- out before anything else: a forged copy must not push out the event it copies.
-- `event` is a 64-bit hash, only ever compared within one user.
create or replace temp table keyed as
select
    users.u,
    items.i,
    requests.q,
    hash(logged.event_id) as event,
    logged.level,
    logged.occurred_at,
    logged.arrived_at,
    logged.landed_at,
    logged.kafka_partition,
    logged.kafka_offset,
    logged.policy_version,
    logged.propensity,
    logged.position,
    coalesce(kinds.explicit, false) as explicit,
    -- a click, a dwell or anything said about an item answers an impression of it
    coalesce(kinds.answers, false) as answers,
    logged.kind = 'impression' as impression,
    logged.kind = 'served' as served,
    -- what a prompt's history is made of: liked, or taken up without being disliked
    coalesce(
        logged.kind <> 'served'
        and (logged.level = 1 or (kinds.engages and logged.level is distinct from -1)),
        false
    ) as engaged
from logged
join users using (user_id)
join items using (item_id)
left join requests using (request_id)
left join kinds using (kind)
where $unsigned or logged.signed is distinct from false
