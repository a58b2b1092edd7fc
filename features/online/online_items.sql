-- What the log holds on each item that was touched: events by their own level, all events, the latest one.
select
    item_id,
    count(*) filter (level = -1) as item_disliked,
    count(*) filter (level = 0) as item_neutral,
    count(*) filter (level = 1) as item_liked,
    count(*) as item_events,
    epoch_us(max(occurred_at)) as item_last_at
from whole_log
where kind <> 'served' and ($everything or item_id in (select item_id from touched_items))
group by item_id
order by item_id
