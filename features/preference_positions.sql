-- Where on its slate each item stood, by the server's first record of it; nothing where no weight asks for it.
create or replace temp table positions as
select u, q, i, arg_min(position, (landed_at, kafka_partition, kafka_offset)) as position
from keyed
where $position_bias > 0
    and served
    and q is not null
    and position is not null
    and u between $first and $last
group by u, q, i
