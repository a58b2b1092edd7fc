-- The rows of the last period (`period` 0) and of those before it, by arrival, counted back from `until`.
create or replace temp table recent as
select
    (epoch_us($until::timestamptz) - epoch_us(arrived_at)) // $period_us::bigint as period,
    user_id, item_id, kind, level, propensity,
    coalesce(source, 'no source') as client,
    kind = 'served' as served,
    signed is not distinct from false as forged
from log
where arrived_at <= $until::timestamptz
    and arrived_at > $until::timestamptz - to_microseconds($period_us::bigint * ($trailing::bigint + 1))
