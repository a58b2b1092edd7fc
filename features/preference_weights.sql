-- What each like's sample weighs, before the stage's means divide it:
-- `recency`: 2 ^ -(age / half-life), the age by arrival against the watermark, counted up to the window's edge
--   (what is replayed is wanted for its age) and to 20 half-lives. No watermark, no age.
-- `inverse_propensity`: 1 / (propensity * examination), clipped; the examination of place k is (1/k)^bias
--   (Joachims, Swaminathan and Schnabel 2017). Null where no propensity was logged.
create or replace temp table weights as
with aged as (
    select
        likes.*,
        greatest(0, epoch_us($watermark::timestamptz) - epoch_us(
            greatest(in_force.arrived_at, coalesce($since::timestamptz, in_force.arrived_at))
        )) as age_us
    from likes
    join in_force using (u, i)
)
select
    aged.u, aged.i,
    case when $half_life_us is null then 1.0 else pow(2, -least(age_us / $half_life_us, 20)) end as recency,
    case
        when $propensity_clip is not null and propensity is not null
        then least(pow(coalesce(positions.position, 1), $position_bias) / propensity, $propensity_clip)
    end as inverse_propensity
from aged
left join positions on positions.u = aged.u and positions.q = aged.q and positions.i = aged.i
