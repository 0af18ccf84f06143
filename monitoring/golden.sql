-- name: keep
insert into rescoring
    (model, version, metric, rows, failed, score, reference, difference, changed, answers, judge)
values (%(model)s, %(version)s, %(metric)s, %(rows)s, %(failed)s, %(score)s, %(reference)s, %(difference)s, %(changed)s,
        %(answers)s, %(judge)s)
returning model, version, at, metric, rows, failed, score, reference, difference, changed, judge

-- name: first_answers
select answers from rescoring
where model = %(model)s and version = %(version)s and answers is not null
order by id limit 1

-- name: newest
select model, version, at, metric, rows, failed, score, reference, difference, changed, judge
from rescoring where model = %(model)s and version = %(version)s
order by id desc limit %(limit)s

-- name: hosted
select manifest ->> 'hosted' is not null as yes from version where model = %(model)s and number = %(version)s

-- name: drop_old
-- But for the answers that later ones are held against
delete from rescoring where at < now() - make_interval(days => %(days)s) and answers is null
