-- Take what `doubted` names out of what is learned from; `marks` keeps the first mark of each.
create or replace temp table keyed as
select keyed.* from keyed anti join doubted using (u, landed_at, kafka_partition, kafka_offset)
