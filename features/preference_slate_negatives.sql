-- Disliked and neutral items of the slates that likes belong to, latest decided first: whatever came in under
-- the slate's request id, in any order of arrival, by the level in force.
create or replace temp table slate_negatives as
with asked as (select distinct u, q from likes where q is not null),
touched as (
    select distinct events.u, events.q, events.i
    from events
    semi join asked using (u, q)
)
select touched.u, touched.q, in_force.level, list(touched.i order by in_force.n desc)[:$max_rejected] as entries
from touched
join in_force using (u, i)
where in_force.level <> 1
group by touched.u, touched.q, in_force.level
