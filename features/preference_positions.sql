-- Where on its slate each item stood, by the server's first record of it; nothing where no weight asks for it.
-- Read from the log itself: no other query needs positions, and they would be carried along for every event.
create or replace temp table positions as
select users.u, requests.q, items.i,
    arg_min(logged.position, (logged.landed_at, logged.kafka_partition, logged.kafka_offset)) as position
from logged
join users using (user_id)
join items using (item_id)
join requests using (request_id)
where $position_bias > 0
    and logged.kind = 'served'
    and logged.position is not null
    and users.u between $first and $last
    and ($unsigned or logged.signed is distinct from false)
group by users.u, requests.q, items.i
