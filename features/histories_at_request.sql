-- The prompt's history for each row of `asks`: of the last `look_back` engaged events that occurred strictly
-- before the request, those that had landed by then, each item at its latest place, without the `excluded`
-- items; the last `length` of them, oldest first. Two neighbouring blocks hold all that is looked at.
create or replace temp table prompted as
with placed as (
    select
        asks.*,
        coalesce(moments.engaged_by_then, 0) as engaged_before,
        (engaged_before - 1) // $look_back as block
    from asks
    asof left join moments on moments.u = asks.u and moments.occurred_at < asks.asked_at
),
looked_at as (
    select
        placed.*,
        list_reverse(list_concat(
            coalesce(previous.entries[engaged_before - placed.block * $look_back + 1:], []),
            coalesce(latest.entries[:engaged_before - placed.block * $look_back], [])
        )) as latest_first
    from placed
    left join engaged as latest
        on latest.u = placed.u and latest.block = placed.block and engaged_before > 0
    left join engaged as previous on previous.u = placed.u and previous.block = placed.block - 1
),
landed_by_then as (
    select
        * exclude (latest_first, block, engaged_before),
        list_transform(
            list_filter(latest_first, lambda x: asked_seq is null or (x >> 32) < asked_seq),
            lambda x: (x & 4294967295)::integer
        ) as engaged_items
    from looked_at
)
select
    * exclude (engaged_items, excluded),
    list_reverse(list_filter(
        engaged_items,
        lambda x, place: not list_contains(excluded, x) and list_position(engaged_items, x) = place
    )[:$history_length]) as history
from landed_by_then
