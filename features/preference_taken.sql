-- Each user's engaged events, numbered from 1 in the order in which they occurred.
create or replace temp table taken as
select u, i, seq, occurred_at, row_number() over (partition by u order by n) as place
from events
where engaged
