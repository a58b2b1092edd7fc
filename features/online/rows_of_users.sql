-- The rows of the users that are pushed: what the queries over them need, read from the log once.
select * exclude (landed_on) replace (null::varchar as text, null::varchar as extra)
from whole_log
semi join pushed_users using (user_id)
