-- Every request id that some event carries, numbered (the order means nothing).
create or replace temp table requests as
select request_id, (row_number() over () - 1)::integer as q
from (select distinct request_id from logged where request_id is not null)
