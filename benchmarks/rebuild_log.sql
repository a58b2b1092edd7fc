-- A made log of about the shape of a live one: slates of eight served and seen items with reactions, the rest
-- organic ratings. Half a percent of the slates' events landed twice, one in a hundred came two hours late.
-- Everything follows from hashes of numbers: the same rows on every machine.
copy (
with slates as (
    select
        n as r,
        hash(n, 'user') % $users as u,
        timestamptz '2026-01-01 00:00:00+00' + to_seconds(hash(n, 'time') % (90 * 86400)) as asked_at,
        hash(n, 'sampled') % 10 = 0 as sampled
    from range($slates) as every(n)
),
shown as (
    select
        slates.*, place, hash(r, place, 'luck') as luck,
        least(hash(r, place, 'a') % $items, hash(r, place, 'b') % $items) as i
    from slates, range(1, 9) as places(place)
),
events as (
    select r, u, i, place, sampled, asked_at as occurred_at, 'served' as kind, null::tinyint as level from shown
    union all
    select r, u, i, place, sampled, asked_at + to_seconds(2 * place), 'impression', 0 from shown
    union all
    select r, u, i, place, sampled, asked_at + to_seconds(20 * place), 'click', null from shown where luck % 5 = 0
    union all
    select r, u, i, place, sampled, asked_at + to_seconds(20 * place + 30), 'like', 1 from shown where luck % 10 = 0
    union all
    select r, u, i, place, sampled, asked_at + to_seconds(20 * place + 5), 'dislike', -1 from shown where luck % 16 = 1
),
slate_rows as (
    select *, hash(r, place, kind) as h from events
),
twice as (
    select *, 0 as again from slate_rows
    union all
    select *, 1 as again from slate_rows where h % 200 = 0
),
every_row as (
    select
        's' || r || '-' || place || '-' || kind as event_id,
        u, i, kind, occurred_at, level,
        'r' || lpad(r::varchar, 10, '0') || '.' || md5('key' || r) as request_id,
        case when kind = 'served' then place::integer end as position,
        case when kind = 'served' then 'v' || (1 + r % 7) end as policy_version,
        case when kind = 'served' and sampled then 0.01::double end as propensity,
        true as signed,
        occurred_at + to_seconds(case when h % 100 = 1 then 7200 else again + 1 end) as arrived_at
    from twice
    union all by name
    select
        'o' || n as event_id,
        hash(n, 'organic user') % $users as u,
        least(hash(n, 'c') % $items, hash(n, 'd') % $items) as i,
        'rating' as kind,
        timestamptz '2026-01-01 00:00:00+00' + to_seconds(hash(n, 'organic time') % (90 * 86400)) as occurred_at,
        (case when hash(n, 'taste') % 10 < 5 then 1 when hash(n, 'taste') % 10 < 8 then 0 else -1 end)::tinyint
            as level,
        occurred_at + to_seconds(1) as arrived_at
    from range($rows - (select count(*) from twice)) as organic(n)
)
select
    event_id,
    'u' || u as user_id,
    'i' || i as item_id,
    kind, occurred_at, level,
    '0123456789ab' as rules,
    request_id, position, policy_version, propensity,
    null::double as value,
    null::varchar as text,
    null::varchar as source,
    '1.0' as schema_version,
    null::varchar as extra,
    signed, arrived_at,
    date_trunc('minute', arrived_at) + interval 1 minute as landed_at,
    (u % 4)::integer as kafka_partition,
    row_number() over (partition by u % 4 order by arrived_at, event_id) as kafka_offset
from every_row
) to '$folder' (format parquet, per_thread_output true)
