-- How many engaged events a user had by the end of each moment at which there was one.
create or replace temp table moments as
select u, occurred_at, max(place) as engaged_by_then
from taken
group by u, occurred_at
