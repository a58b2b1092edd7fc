-- Events that landed more than once (a producer's retry), with the landing that counts: the first.
create or replace temp table duplicates as
select u, event, min(seq) as seq, count(*) - 1 as dropped
from landed
group by u, event
having count(*) > 1
