-- One shard's rows with `seq`, the order in which a user's events landed: by commit, then by place in the
-- topic. Within a partition that is the order of offsets, also when a new topic started again at zero.
-- Positions stay behind: they would be carried along for every event, and no query over events needs them.
create or replace temp table landed as
select
    * exclude (position),
    row_number() over (partition by u order by landed_at, kafka_partition, kafka_offset)::bigint as seq
from keyed
where u between $first and $last
