-- The levels in force of this shard with their names, by user and item.
select
    users.user_id,
    items.item_id,
    in_force.level,
    in_force.occurred_at,
    in_force.arrived_at,
    in_force.seq
from in_force
join users using (u)
join items using (i)
order by in_force.u, in_force.i
