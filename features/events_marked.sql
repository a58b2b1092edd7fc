-- Feedback that cannot be what it says, by the server's own records of what it served, each with its mark:
-- `organic`: it names no request and landed after the day from which feedback must;
-- `cross_user`: the request was served to others and not to this user; `replayed`: too long after its slate;
-- `off_slate`: the item was not on that slate; `position`: another item stood there, or nothing.
-- What no record speaks of stays as it is: the producer may have request ids of its own.
-- Almost nothing is marked, so every check asks for what is missing (an anti join) and gathers nothing about
-- the rest; of several marks of a row the first in the order above counts.
create or replace temp table doubted as
with placed as (
    select u, q, i, position, arrived_at from keyed where served and q is not null
),
asked as (select u, q, min(arrived_at) as asked_at, max(position) as places from placed group by u, q),
claims as (
    select u, q, i, position, landed_at, kafka_partition, kafka_offset
    from keyed
    where q is not null and not served
),
unfit as (
    select
        keyed.u, keyed.q, keyed.landed_at, keyed.kafka_partition, keyed.kafka_offset,
        asked.asked_at is null as stranger
    from keyed
    left join asked using (u, q)
    where keyed.q is not null
        and (asked.asked_at is null or keyed.arrived_at > asked.asked_at + to_microseconds($age_us::bigint))
),
-- A forged record of serving is none, or it would make strangers of those who answer.
served_to_others as (
    select q from asked
    union all
    select requests.q
    from whole_log
    join requests using (request_id)
    where not $everyone and whole_log.kind = 'served' and ($unsigned or whole_log.signed is distinct from false)
),
off as (
    select * from claims anti join placed using (u, q, i) where $off_slate
),
misplaced as (
    select * from claims anti join placed using (u, q, i, position)
    where $positions and position is not null
),
found as (
    select u, landed_at, kafka_partition, kafka_offset, 1 as place, 'organic' as mark
    from keyed
    where q is null and not served and landed_at >= $organic_until::timestamptz
    union all
    select u, landed_at, kafka_partition, kafka_offset, 2, 'cross_user'
    from unfit
    where $cross_user and stranger and q in (select q from served_to_others)
    union all
    select u, landed_at, kafka_partition, kafka_offset, 3, 'replayed' from unfit where not stranger
    union all
    select u, landed_at, kafka_partition, kafka_offset, 4, 'off_slate' from off semi join asked using (u, q)
    union all
    select u, landed_at, kafka_partition, kafka_offset, 5, 'position'
    from misplaced
    semi join (select u, q from asked where places is not null) using (u, q)
    -- a record without a place leaves open where the item stood
    anti join (select u, q, i from placed where position is null) using (u, q, i)
)
select u, landed_at, kafka_partition, kafka_offset, arg_min(mark, place) as mark
from found
group by u, landed_at, kafka_partition, kafka_offset
