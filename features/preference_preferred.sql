-- The likes again, with another preference among a user's: those on slates that a policy of `lineage` served
-- come first, then the latest. A like from before the window gets a number below 0, so it comes after all of the
-- window: minus its draw, which is below 2^52 and follows from user, item and window alone (another window draws
-- others).
create or replace temp table likes as
select
    likes.* exclude (preferred),
    case
        when $since::timestamptz is null or in_force.arrived_at > $since::timestamptz
        then likes.n + (coalesce(list_contains($lineage::varchar[], likes.policy_version), false)::bigint << 40)
        else -1 - (
            '0x' || md5(users.user_id || chr(31) || items.item_id || chr(31) || epoch_us($since::timestamptz))[:13]
        )::bigint
    end as preferred
from likes
join in_force using (u, i)
join users using (u)
join items using (i)
