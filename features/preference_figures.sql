-- What the whole stage decides: how many older samples are replayed (the greatest draw that is), and the means
-- that weights are divided by. Sums are of integers, so they are the same in whatever order rows are added.
create or replace temp table figures as
with drafted as (
    select
        preferred > 0 as fresh,
        -preferred as draw,
        coalesce(recency, 1) as recency,
        inverse_propensity
    from read_parquet($drafts)
),
wanted as (
    select round(count(*) * $replay_share / (1 - $replay_share))::bigint as samples from drafted where fresh
),
drawn as (
    select max(draw) as last_draw
    from (select draw from drafted where not fresh order by draw limit (select samples from wanted))
),
kept as (select drafted.* from drafted, drawn where fresh or draw <= last_draw),
sampled as (
    select coalesce(sum(round(inverse_propensity * 1e12)::bigint)::double / count(inverse_propensity) / 1e12, 1.0) as mean
    from kept
)
select
    any_value(last_draw) as last_draw,
    any_value(sampled.mean) as inverse_mean,
    -- the mean weight before the division: recency times normalised inverse propensity
    sum(round(recency * coalesce(inverse_propensity / sampled.mean, 1) * 1e12)::bigint)::double / count(*) / 1e12 as mean
from kept, drawn, sampled
