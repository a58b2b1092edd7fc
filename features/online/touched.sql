-- Users whose values may differ from those of the last version: who has new rows, and whose impressions'
-- windows closed because the watermark moved on.
select distinct user_id from new_rows
union
select distinct user_id
from whole_log
where kind = 'impression'
    and arrived_at + to_microseconds($window_us) <= $watermark::timestamptz
    and arrived_at + to_microseconds($window_us) > $watermark_before::timestamptz
order by user_id
