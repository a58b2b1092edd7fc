-- One stage's rows of this shard, in the order of the dataset: by user, then by chosen item. The lists still
-- hold item numbers.
select
    md5($stage || chr(31) || users.user_id || chr(31) || items.item_id)[:16] as sample_id,
    users.user_id,
    prompted.history,
    items.item_id as chosen,
    prompted.rejected,
    prompted.asked_at,
    requests.request_id,
    prompted.policy_version,
    prompted.propensity,
    roles.role,
    prompted.available,
    prompted.first_of_user,
    prompted.preferred,
    weights.recency,
    weights.inverse_propensity
from prompted
join users using (u)
join items using (i)
join roles on roles.user_id = users.user_id
left join requests using (q)
left join weights on weights.u = prompted.u and weights.i = prompted.i
order by prompted.u, prompted.i
