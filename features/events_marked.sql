-- Feedback that cannot be what it says, by the server's own records of what it served, each with its mark:
-- `cross_user`: the request was served to others and not to this user; `replayed`: too long after its slate;
-- `off_slate`: the item was not on that slate; `position`: another item stood there, or nothing;
-- `organic`: it names no request and landed after the day from which feedback must.
-- What no record speaks of stays as it is: the producer may have request ids of its own.
create or replace temp table marked as
with placed as (
    select u, q, i, position, arrived_at from keyed where served and q is not null
),
asked as (select u, q, min(arrived_at) as asked_at, max(position) as places from placed group by u, q),
on_slate as (select u, q, i, bool_or(position is null) as anywhere from placed group by u, q, i),
taken as (select distinct u, q, i, position from placed where position is not null),
claims as (
    select
        keyed.u, keyed.q, keyed.i, keyed.position, keyed.served, keyed.arrived_at,
        keyed.landed_at, keyed.kafka_partition, keyed.kafka_offset,
        asked.asked_at, asked.places
    from keyed
    left join asked using (u, q)
    where keyed.q is not null or ($organic_until::timestamptz is not null and not keyed.served)
),
strangers as (select distinct q from claims where q is not null and asked_at is null),
owned as (
    select distinct requests.q
    from whole_log
    join requests using (request_id)
    where $cross_user and whole_log.kind = 'served' and requests.q in (select q from strangers)
)
select
    claims.u, claims.landed_at, claims.kafka_partition, claims.kafka_offset,
    case
        when claims.q is null then case when claims.landed_at >= $organic_until::timestamptz then 'organic' end
        when claims.asked_at is null then case when owned.q is not null then 'cross_user' end
        when claims.arrived_at > claims.asked_at + to_microseconds($age_us::bigint) then 'replayed'
        when claims.served then null
        when $off_slate and on_slate.q is null then 'off_slate'
        when $positions and claims.position is not null and claims.places is not null
            and taken.q is null and not coalesce(on_slate.anywhere, false) then 'position'
    end as mark
from claims
left join owned on owned.q = claims.q
left join on_slate on on_slate.u = claims.u and on_slate.q = claims.q and on_slate.i = claims.i
left join taken on taken.u = claims.u and taken.q = claims.q and taken.i = claims.i
    and taken.position = claims.position
where mark is not null
