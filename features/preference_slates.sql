-- When each slate was requested, on both clocks: its first served record. `engaged_before` counts the
-- user's engaged events that occurred strictly before the request.
create or replace temp table slates as
select
    u, q,
    min(occurred_at) as asked_at,
    min(seq) as asked_seq,
    min(engaged_before) as engaged_before,
    min(arrived_at) as arrived_at
from events
where served and q is not null
group by u, q
