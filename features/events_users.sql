-- Every user, numbered in the order of the ids: a shard of a build is a range of these numbers.
create or replace temp table users as
select user_id, (row_number() over (order by user_id) - 1)::integer as u, events
from (select user_id, count(*) as events from logged group by user_id)
