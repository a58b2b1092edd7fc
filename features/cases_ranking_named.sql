-- The ranking cases of this shard with their names, by user and target.
select
    users.user_id,
    prompted.history,
    items.item_id as target,
    prompted.asked_at,
    requests.request_id,
    prompted.sampled
from prompted
join users using (u)
join items using (i)
left join requests using (q)
order by prompted.u, prompted.i
