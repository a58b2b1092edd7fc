-- Feedback above a cap, by landing: the first so many of a user on a day, and of a request, are learned from;
-- what lands later never changes what was below the cap. Only crowded groups are sorted. Of both marks of a row
-- `request_cap` counts.
create or replace temp table doubted as
with crowded_days as (
    select u, landed_at::date as day
    from keyed
    where not served and $user_day::bigint is not null
    group by u, day
    having count(*) > $user_day::bigint
),
crowded_requests as (
    select u, q
    from keyed
    where not served and q is not null and $request::bigint is not null
    group by u, q
    having count(*) > $request::bigint
),
found as (
    select u, landed_at, kafka_partition, kafka_offset, 'user_cap' as mark
    from keyed
    semi join crowded_days on crowded_days.u = keyed.u and crowded_days.day = keyed.landed_at::date
    where not served
    qualify row_number() over (
        partition by u, landed_at::date order by landed_at, kafka_partition, kafka_offset
    ) > $user_day::bigint
    union all
    select u, landed_at, kafka_partition, kafka_offset, 'request_cap' as mark
    from keyed
    semi join crowded_requests using (u, q)
    where not served
    qualify row_number() over (partition by u, q order by landed_at, kafka_partition, kafka_offset) > $request::bigint
)
select u, landed_at, kafka_partition, kafka_offset, min(mark) as mark
from found
group by u, landed_at, kafka_partition, kafka_offset
