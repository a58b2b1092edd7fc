-- What was on each slate, once an item, with the facts the server wrote about it.
create or replace temp table slate_items as
select
    u, q, i,
    arg_min_null(policy_version, seq) as policy_version,
    arg_min_null(propensity, seq) as propensity
from events
where served and q is not null
group by u, q, i
