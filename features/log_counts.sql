-- What the log holds, before any deduplication: rows, distinct users and items, rows by level.
-- A level is what an event said by itself when it landed; "none" are served slates, clicks, middling dwell.
select
    count(*) as rows,
    count(distinct user_id) as users,
    count(distinct item_id) as items,
    count(*) filter (where level = -1) as disliked,
    count(*) filter (where level = 0) as neutral,
    count(*) filter (where level = 1) as liked,
    count(*) filter (where level is null) as none
from log
