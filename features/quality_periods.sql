-- Each period in figures; what the server wrote about itself (`served`) is counted apart.
with of_users as (
    select period, user_id, count(*) as events, count(level) as levels, count(*) filter (where level = 1) as likes
    from recent
    where not served
    group by period, user_id
),
users as (
    select
        period,
        count(*) as users,
        max(events) as most_of_user,
        arg_max(user_id, (events, user_id)) as busiest,
        count(*) filter (where levels >= 10 and likes = levels) as likes_only
    from of_users
    group by period
)
select
    recent.period,
    count(*) filter (where not served) as events,
    any_value(users.users) as users,
    count(distinct item_id) filter (where not served) as items,
    count(*) filter (where level = 1 and not served) as liked,
    count(*) filter (where level = 0 and not served) as neutral,
    count(*) filter (where level = -1 and not served) as disliked,
    count(*) filter (where level is null and not served) as unlevelled,
    count(*) filter (where served) as served,
    count(*) filter (where served and propensity is not null) as sampled,
    avg(propensity) filter (where served) as mean_propensity,
    count(*) filter (where forged) as forged,
    any_value(users.most_of_user) as most_of_user,
    any_value(users.busiest) as busiest,
    any_value(users.likes_only) as likes_only
from recent
left join users using (period)
group by recent.period
order by recent.period
