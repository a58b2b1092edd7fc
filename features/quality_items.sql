-- The item whose share of all likes rose most from the trailing periods to the last one.
with counted as (
    select
        item_id,
        count(*) filter (where period = 0) as now,
        count(*) filter (where period > 0) as before
    from recent
    where level = 1 and not served
    group by item_id
),
shares as (
    select item_id, now / sum(now) over () as now, before / sum(before) over () as before from counted
)
select item_id, now, before from shares order by now - before desc, item_id limit 1
