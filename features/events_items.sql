-- Every item, numbered in the order of the ids: lists of numbers are a fraction of lists of strings.
create or replace temp table items as
select item_id, (row_number() over (order by item_id) - 1)::integer as i
from (select distinct item_id from logged)
