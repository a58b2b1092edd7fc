-- What is not learned from, with its names: rows that carry a mark, and those under request ids not ours.
select
    logged.user_id, logged.event_id, logged.item_id, logged.kind, logged.request_id, logged.position,
    logged.landed_at,
    coalesce(marks.mark, 'unsigned') as mark
from logged
join users using (user_id)
left join marks using (u, landed_at, kafka_partition, kafka_offset)
where marks.mark is not null or (not $unsigned and logged.signed is not distinct from false)
order by logged.user_id, logged.landed_at, logged.kafka_partition, logged.kafka_offset
