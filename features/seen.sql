-- What a user has met: every item with any event but `served` (served is not seen), signed or not.
select user_id, list(item_id order by item_id) as item_ids
from (select distinct user_id, item_id from logged where kind <> 'served')
group by user_id
order by user_id
