-- When each slate was requested, on both clocks: its first served record.
create or replace temp table slates as
select
    u, q,
    min(occurred_at) as asked_at,
    min(seq) as asked_seq,
    min(arrived_at) as arrived_at
from events
where served and q is not null
group by u, q
