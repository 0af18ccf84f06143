-- name: keep
insert into judgement (model, number, actor, reason, metrics, evaluation, gate, decision, report)
values (%(model)s, %(number)s, %(actor)s, %(reason)s, %(metrics)s, %(evaluation)s, %(gate)s, %(decision)s, %(report)s)

-- name: enqueue
insert into outbox (kind, model) values ('mlflow_aliases', %(model)s)

-- name: newest
select at, actor, reason from judgement where model = %(model)s and number = %(number)s order by id desc limit 1

-- name: report
select report from judgement where model = %(model)s and number = %(number)s order by id desc limit 1
