-- What each client (the events' `source`) sent, now and before: events, those with a level, likes.
select
    client,
    count(*) filter (where period = 0) as events,
    count(level) filter (where period = 0) as levels,
    count(*) filter (where period = 0 and level = 1) as likes,
    count(level) filter (where period > 0) as levels_before,
    count(*) filter (where period > 0 and level = 1) as likes_before
from recent
where not served
group by client
order by client
