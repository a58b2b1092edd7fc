-- What users made of the first $judged items that a version showed them since $since, one row a user and
-- version that has so many: the share that is liked by the level in force, and when the last of them was shown.
-- An item counts once its window has closed against the watermark, so that likes do not count before what was
-- passed over; one that two versions showed, or that was judged before, counts for neither.
with shown as (
    select u, i, any_value(policy_version) as version, min(seq) as seq, min(arrived_at) as shown_at
    from events
    where served and occurred_at >= $since::timestamptz and policy_version is not null
    group by u, i
    having count(distinct policy_version) = 1
),
judged as (
    select
        shown.u, shown.version, shown.shown_at, in_force.level,
        row_number() over (partition by shown.u, shown.version order by shown.seq, shown.i) as place
    from shown
    join in_force using (u, i)
    where shown.version in ($first_version, $second_version)
        and in_force.arrived_at >= $since::timestamptz
        and shown.shown_at + to_microseconds($window_us) <= $watermark::timestamptz
)
select
    users.user_id,
    judged.version,
    avg((judged.level = 1)::int)::double as liked,
    max(judged.shown_at) as known_at
from judged
join users using (u)
where judged.place <= $judged
group by judged.u, users.user_id, judged.version
having count(*) = $judged
order by judged.u, judged.version
