-- Events of each kind, now and in the trailing periods.
select
    kind,
    count(*) filter (where period = 0) as now,
    count(*) filter (where period > 0) as before
from recent
where not served
group by kind
order by kind
