-- Likes that no policy's own ranking selected: organic ones, and those of slates that were sampled.
create or replace temp table asks as
select
    u, q, i, asked_at, asked_seq,
    on_slate as sampled,
    [i] as excluded
from likes
where not on_slate or propensity is not null
qualify row_number() over (partition by u order by n desc) <= $cap
