-- Each user's disliked and neutral items in the order in which they became so, in blocks of the most that
-- one sample can use.
create or replace temp table negatives as
select
    u, level,
    (place - 1) // $max_rejected as block,
    list(i order by n) as entries
from in_force
where level <> 1
group by u, level, block
