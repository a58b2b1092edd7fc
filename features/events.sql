-- One shard's events, each once, with its place on both clocks: `seq` when it landed, `n` when it occurred
-- (ties: landed earlier first). Row numbers only: a count over a growing frame takes more than linear time for
-- a user with many events.
create or replace temp table events as
with once as (
    select landed.*
    from landed
    anti join (
        select landed.u, landed.seq
        from landed
        join duplicates on landed.u = duplicates.u and landed.event = duplicates.event
        where landed.seq > duplicates.seq
    ) as repeated on landed.u = repeated.u and landed.seq = repeated.seq
)
select
    u, i, q, seq, level, occurred_at, arrived_at, policy_version, propensity,
    explicit, answers, impression, served, engaged,
    row_number() over (partition by u order by occurred_at, seq)::bigint as n
from once
