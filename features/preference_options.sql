-- The likes again, by the options that are on:
-- `fresh`: arrived inside the window; the others are candidates for a replay, each with its `draw`, a number
--   below 2^52 that follows from user, item and window alone: another window draws others.
-- `preferred`: which of a user's likes a cap keeps. Those that a policy of the lineage served, if that is
--   wanted, then the latest; of replay candidates those with the least draw.
-- `recency`: 2 ^ -(age / half-life), the age by arrival against the watermark, counted up to the window's edge
--   (what is replayed is wanted for its age) and to 20 half-lives. No watermark, no age.
-- `inverse_propensity`: 1 / (propensity * examination), clipped; the examination of place k is (1/k)^bias
--   (Joachims, Swaminathan and Schnabel 2017). Null where no propensity was logged.
create or replace temp table likes as
with plain as (
    select
        * exclude (fresh, preferred, draw, recency, inverse_propensity),
        $since::timestamptz is null or arrived_at > $since::timestamptz as fresh,
        greatest(arrived_at, coalesce($since::timestamptz, arrived_at)) as counted_from
    from likes
),
told as (
    select
        plain.*,
        case when not fresh then (
            '0x' || md5(users.user_id || chr(31) || items.item_id || chr(31) || epoch_us($since::timestamptz))[:13]
        )::bigint end as draw,
        coalesce(list_contains($lineage::varchar[], plain.policy_version), false) as own,
        greatest(0, epoch_us($now::timestamptz) - epoch_us(counted_from)) as age_us,
        coalesce(positions.position, 1) as position
    from plain
    join users using (u)
    join items using (i)
    left join positions on positions.u = plain.u and positions.q = plain.q and positions.i = plain.i
)
select
    * exclude (counted_from, own, age_us, position),
    case when fresh then n + (own::bigint << 40) else -draw end as preferred,
    case when $half_life_us is null then 1.0 else pow(2, -least(age_us / $half_life_us, 20)) end as recency,
    case
        when $propensity_clip is not null and propensity is not null
        then least(pow(position, $position_bias) / propensity, $propensity_clip)
    end as inverse_propensity
from told
