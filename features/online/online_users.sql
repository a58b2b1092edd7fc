-- What the online store holds of each user: one whole row, from the same history, levels and seen items that
-- datasets are made of. Nulls do not exist in Feast's lists, so no level is the word 'none'.
with counted as (
    select
        user_id,
        count(*) filter (level = -1) as disliked,
        count(*) filter (level = 0) as neutral,
        count(*) filter (level = 1) as liked
    from levels_now
    group by user_id
),
profiles as (
    select
        user_id,
        count(*) as events,
        epoch_us(min(occurred_at)) as first_at,
        epoch_us(max(occurred_at)) as last_at
    from logged
    group by user_id
)
select
    profiles.user_id,
    coalesce(histories_now.item_ids, []::varchar[]) as item_ids,
    coalesce(
        list_transform(
            histories_now.levels,
            lambda level: case level when 1 then 'liked' when 0 then 'neutral' when -1 then 'disliked' else 'none' end
        ),
        []::varchar[]
    ) as item_levels,
    coalesce(list_transform(histories_now.times, lambda time: epoch_us(time)), []::bigint[]) as item_times,
    coalesce(seen_now.item_ids, []::varchar[]) as seen_ids,
    coalesce(counted.disliked, 0)::bigint as disliked,
    coalesce(counted.neutral, 0)::bigint as neutral,
    coalesce(counted.liked, 0)::bigint as liked,
    profiles.events,
    profiles.first_at,
    profiles.last_at
from profiles
left join histories_now using (user_id)
left join seen_now using (user_id)
left join counted using (user_id)
order by profiles.user_id
