-- The sampled slates of this shard with their names, by user and time of the request.
select
    users.user_id,
    requests.request_id,
    prompted.asked_at,
    prompted.policy_version,
    prompted.history,
    prompted.met,
    prompted.shown as items,
    prompted.propensities,
    prompted.liked
from prompted
join users using (u)
join requests using (q)
order by prompted.u, prompted.asked_at, requests.request_id
