-- Each user's engaged events in order of occurrence, cut into blocks as long as the look-back: the last
-- `look_back` before any moment lie in two neighbouring blocks, so that nothing is ever copied per event.
-- An entry packs (seq, item) into one number: seq * 2^32 + i.
create or replace temp table engaged as
select
    u,
    (place - 1) // $look_back as block,
    list((seq << 32) + i order by place) as entries
from taken
group by u, block
