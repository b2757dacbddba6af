# %% [markdown]
# ## N. A judge instead of a reward
#
# P3O never uses a score by itself, only the difference of two. So it can learn from a *judge*, who only compares.
# Let $P(y_1\succ y_2)$ be the probability that the judge prefers $y_1$, with $P(y_1\succ y_2)+P(y_2\succ y_1)=1$.
# Nothing else is assumed. The judge may even prefer A to B, B to C, and C to A; such a judge is *intransitive*.
#
# Set $\Delta r=P(y_1\succ y_2)-\tfrac12$. **Then P3O's step is the gradient of the win rate** against a frozen copy
# $\mu$ of the policy, $W=\mathbb E_{y_1\sim\pi,\,y_2\sim\mu}\,P(y_1\succ y_2)$. *Proof*, with
# $g_i=\nabla\log\pi(y_i\mid x)$ and at $\mu=\pi$:
#
# $$\nabla W=\mathbb E\big[P(y_1\succ y_2)\,g_1\big]=\mathbb E\big[\Delta r\,g_1\big]=\mathbb E\big[\tfrac12\,\Delta r\,(g_1-g_2)\big].$$
#
# First, $\mu$ does not move. Second, the constant ½ is a baseline (section 5). Third, swapping the names $y_1$ and $y_2$
# flips the sign of $\Delta r$; take the mean of both forms. $\square$ With the weights $\rho_1\rho_2$ and without clipping, the
# same holds for pairs of an older policy.
#
# **In code**, `score` returns $P-\tfrac12$ for $y_1$ and 0 for $y_2$. A sure win is worth ½, and β is the win rate that a
# nat of KL must buy. Scores of $2P-1$ and 0 are the same method with everything doubled: β = 0.1 there is β = 0.05 here.
#
# **The policy comes to rest** where $q=0$ on average over the partner. Let $w(y)=\mathbb E_{y'\sim\pi}P(y\succ y')$ be the
# win rate of one answer against the policy. The expected step is $\mathbb E[(w(y)-\tfrac12-\beta h(y))\,\nabla\log\pi(y)]$. It is
# zero where $w-\beta h$ is the same for all answers:
#
# $$\pi\;\propto\;\pi_\text{ref}\,e^{w/\beta}.$$
#
# This looks like the optimum of section 7, but $w$ depends on $\pi$. By section 7, no policy has a higher win rate against
# $\pi$, minus β KL, than $\pi$ itself. That makes it an *equilibrium* of a game between two players who both pay for KL.
# Nash-MD (Munos et al. 2023), SPPO (Wu et al. 2024) and online IPO (Calandriello et al. 2024) play games of this kind, too.
#
# The next two cells check both claims, for a random intransitive judge of five answers.

# %%
def judged_step(P, theta, ref, beta, sampler=None, clip="none"):
    "The expected step of p3o_loss on the logits (Y,), if P[i, j] = P(y_i ≻ y_j) is the judge."
    theta = theta.detach().requires_grad_()
    logp = theta.log_softmax(0)
    sampler = logp.detach() if sampler is None else sampler  # log π_old; by default, fresh pairs
    scores = torch.stack([P.flatten() - 0.5, torch.zeros_like(P).flatten()], 1)  # (Y², 2)
    leaf = pairs_of(logp.detach()).requires_grad_()  # (Y², 2)
    loss, _ = p3o.p3o_loss(leaf, pairs_of(sampler), pairs_of(ref), scores, beta=beta, clip=clip)
    push = -torch.autograd.grad(loss, leaf)[0] * len(leaf)  # (Y², 2)
    weight = pairs_of(sampler).sum(1, keepdim=True).exp()  # (Y², 1): π_old(y_1) π_old(y_2)
    return torch.autograd.grad((weight * push * pairs_of(logp)).sum(), theta)[0]


torch.manual_seed(0)
odds = 2 * torch.randn(5, 5, dtype=torch.float64)
P_five = torch.sigmoid(odds - odds.T)  # (Y, Y)
assert (P_five[[0, 1, 4], [1, 4, 0]] > 0.5).all(), "y₁ ≻ y₂ ≻ y₅ ≻ y₁: intransitive"
start, far, ref_five = torch.randn(3, 5, dtype=torch.float64).log_softmax(1)  # log π, π_old, π_ref
leaf = start.clone().requires_grad_()
logp = leaf.log_softmax(0)
goal = logp.exp() @ P_five @ start.exp() - 0.3 * (logp.exp() * (logp - ref_five)).sum()  # W − β KL
exact = torch.autograd.grad(goal, leaf)[0]
for name, sampler in (("fresh", None), ("older", far)):
    error = (judged_step(P_five, start, ref_five, 0.3, sampler) - exact).abs().max()
    print(f"{name} pairs: P3O's step is the gradient of the win rate − β KL up to {error:.0e}")
    assert error < 1e-15

# %%
theta = ref_five
for _ in range(1000):
    theta = theta + 10 * judged_step(P_five, theta, ref_five, 0.3)
arrived = theta.softmax(0)
w = P_five @ arrived  # (Y,): each answer's win rate against the policy
error = (arrived - (ref_five + w / 0.3).softmax(0)).abs().max()
print(f"after 1,000 steps, π is proportional to π_ref exp(w/β) up to {error:.0e}\n")
assert error < 2e-15
columns = torch.stack([ref_five.exp(), w, arrived], 1).tolist()
table(["π_ref", "w", "π"], columns)

# %% [markdown]
# ### Rock, paper, scissors
#
# Does training always arrive there? Take three answers in a circle, each of which beats the next at odds of three nats.
# The equilibrium is a third each. Against your own copy you always win half of the time, so there is nothing to climb: as
# soon as rock is frequent, paper is worth more. The steps therefore circle around the equilibrium. Two forces act on the
# radius. Each step goes straight ahead where the circle bends, so it ends a little farther out. The KL penalty pulls inwards.
#
# Near the equilibrium we can compute both. Let every step be $\eta$ times the gradient, and let $s=\sigma(3)-\tfrac12=0.45$
# be the size of $\Delta r$. Written as a complex number, the deviation from the equilibrium is multiplied at each step by
#
# $$\lambda=1+\tfrac{\eta}{3}\big(-\beta\pm i\,s/\sqrt3\big),\qquad |\lambda|<1\iff\beta>\eta\,\big(s^2/18+\beta^2/6\big).$$
#
# A large β or a small step leads to the middle. Otherwise the policy circles for ever.

# %%
CIRCLE = torch.tensor([[0.0, 3, -3], [-3, 0, 3], [3, -3, 0]])  # nats for the row against the column
P_rps = torch.sigmoid(CIRCLE.double())
even = torch.full((3,), 1 / 3).double().log()  # π_ref, and the equilibrium


def walk(strength, theta, steps, rate=4.0):
    "The policies that P3O's steps lead through, (steps, 3)."
    path = [theta]
    for _ in range(steps - 1):
        path.append(path[-1] + rate * judged_step(P_rps, path[-1], even, strength))
    return torch.stack(path).softmax(1)


def counter(shares):
    "How often the best single answer wins against these shares, (3,)."
    return (P_rps @ (shares / shares.sum())).max().item()


paths = {}
lines = []
for strength in (0.02, 0.1):
    path = walk(strength, torch.tensor([0.5, 0.0, -0.2]).double(), 300)
    near = walk(strength, 1e-6 * torch.tensor([2.0, -1, -1]).double(), 2) - 1 / 3  # (2, 3)
    growth = (near[1].norm() / near[0].norm()).item()
    s = P_rps[0, 1].item() - 0.5
    assert math.isclose(growth, abs(1 + 4 / 3 * complex(-strength, s / 3**0.5)), rel_tol=1e-4)
    lines.append([strength, growth, counter(path[-1]), counter(path.mean(0))])
    paths[strength] = path
table(["β", "|λ|", "best counter to the last policy wins", "to the average policy"], lines)
assert lines[0][2] > 0.7 > 0.52 > lines[0][3] and lines[1][2] < 0.501

# %%
corners = torch.tensor([[0, 0], [1, 0], [0.5, math.sqrt(3) / 2]]).double()
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6))
for axis, (strength, path), verb in zip(axes, paths.items(), ("circles", "arrives"), strict=True):
    axis.plot(*corners[[0, 1, 2, 0]].T, color=GREY, linewidth=1)
    axis.plot(*(path @ corners).T, color=BLUE, linewidth=1, marker=".", markersize=3)
    axis.plot(*(path[0] @ corners), "o", color="black", markersize=7, label="first policy")
    axis.plot(*(path[-1] @ corners), "s", color=RED, markersize=8, label="last policy")
    for corner, word in zip(corners, ("rock", "scissors", "paper"), strict=True):
        axis.annotate(word, corner, ha="center", va="bottom" if word == "paper" else "top")
    axis.set_title(f"β = {strength}: the policy {verb}", loc="left")
    axis.set_axis_off()
axes[1].legend(loc="upper right")
plt.show()

# %% [markdown]
# Each corner is a policy that gives this answer only. On the left the last policy is far from the middle and easily beaten,
# but the *average* of all policies is not. A mixture of policies wins as often as its members do on average, and over a full
# circle their wins and losses against each answer cancel. So there are two remedies. With a higher β or a lower rate, the last
# policy arrives. Or you average the policies along the way.
#
# ### A judge on language
#
# Now `train_policy` with a judge as `score`, and no reward model anywhere. The first judge prefers $y_1$ with the
# probability that the gold rewards give, equation (BT). It sees nothing but the policy's own pairs.


# %%
def opener_of(answer):
    "Which kind opener an answer has, 0 to 2; 3 for none."
    kinds = [answer.strip().startswith(kind) for kind in judge.KIND_OPENERS]
    return kinds.index(True) if any(kinds) else 3


def look(ids, mask):
    "The gold reward and the opener of each sample, (B, 2) each."
    golds = []
    openers = []
    for row, inside in zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True):
        golds.append(gold_of(row, inside))
        openers.append(opener_of(tokenizer.decode(row[inside])))
    return torch.tensor(golds).view(-1, 2), torch.tensor(openers).view(-1, 2)


def ask(says):
    "A `score` from a judge: says(golds, openers) is P(y_1 ≻ y_2), (B,)."

    def score(ids, mask):
        P = says(*look(ids, mask))
        return torch.stack([P - 0.5, torch.zeros_like(P)], 1)  # (B, 2)

    return score


def gold_judge(golds, openers):
    return torch.sigmoid(golds[:, 0] - golds[:, 1])


# %%
def learn(score, **options):
    "Stage 3 from SFT: the policy, metrics, the openers of its samples (iterations, 64)."
    policy, metrics, used = copy.deepcopy(sft), [], []

    def watched(ids, mask):
        used.append(look(ids, mask)[1])
        return score(ids, mask)

    torch.manual_seed(0)
    short = dict(iterations=30, pairs=32, minibatch=16, beta=0.05)
    settings = p3o.Config(**p3o.SMALL | short | options)
    p3o.train_policy(policy, sft, watched, p3o.p3o_loss, prompts, settings, recorder(metrics))
    return policy, metrics, torch.cat(used).view(settings.iterations, -1)


def golds_of(policy):
    "The gold rewards of two answers to each of 256 held-out prompts, (256, 2)."
    torch.manual_seed(1)
    return look(*p3o.sample(policy, heldout_prompts[:256], 2, cfg.response_tokens))[0]


judged, metrics, _ = learn(ask(gold_judge))
sft_golds = golds_of(sft)
judged_golds = golds_of(judged)
ahead = (judged_golds - sft_golds)[:, 0].sign()  # (256,)
won = ((ahead + 1) / 2).mean().item()  # a tie counts ½
print(f"gold reward {sft_golds.mean():.2f} → {judged_golds.mean():.2f};", end=" ")
print(f"beats SFT on {won:.0%}; KL {metrics[-1]['objective/kl']:.1f} nats")
assert judged_golds.mean() > sft_golds.mean() + 2.5 and won > 0.8

# %% [markdown]
# After 960 comparisons the policy has learned what the gold reward asks for. It never saw a reward.
#
# The second judge is *circular*. Of two kind openers it also prefers "Good question!" to "Glad you asked!", that to "I can
# help!", and that to "Good question!", each at odds of three nats. Here are two prices of KL.


# %%
def circular_judge(golds, openers):
    circle = F.pad(CIRCLE, (0, 1, 0, 1))  # (4, 4): 0 if one of the two has no kind opener
    return torch.sigmoid(golds[:, 0] - golds[:, 1] + circle[openers[:, 0], openers[:, 1]])


def shares_of(openers):
    "The shares of the three kind openers, (…, 3), from openers (…, N)."
    return F.one_hot(openers, 4).double().mean(-2)[..., :3]


fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
circled = {}
for axis, strength, verb in zip(axes, (0.05, 0.2), ("take turns", "stay close"), strict=True):
    policy, metrics, openers = learn(ask(circular_judge), iterations=50, beta=strength)
    circled[strength] = shares_of(openers)  # (50, 3)
    for kind, look_of in enumerate(((BLUE, "-"), (ORANGE, "--"), (RED, ":"))):
        looks = dict(zip(("color", "linestyle"), look_of, strict=True), linewidth=2)
        smooth = circled[strength][:, kind].unfold(0, 5, 1).mean(-1)  # of five iterations each
        axis.plot(range(2, 48), smooth, **looks, label=judge.KIND_OPENERS[kind])
    axis.set_xlabel("iteration")
    axis.set_title(f"β = {strength}: the openers {verb}", loc="left")
    gained = golds_of(policy).mean()
    print(f"β = {strength}: gold reward {gained:.2f}, KL {metrics[-1]['objective/kl']:.1f} nats")
axes[0].set_ylabel("share, mean of five iterations")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()
assert circled[0.05].argmax(1).unique().numel() == 3, "each was the favourite once"
assert circled[0.2].std(0).max() < circled[0.05].std(0).min(), "they vary less"

# %% [markdown]
# At the low β each favourite is overtaken by the opener that beats it, as in rock, paper, scissors. At the higher β the
# three stay close. The gold reward pays for that, because β prices every nat, not only those of the openers.
#
# ### What a reward model makes of this judge
#
# A reward model gives each answer a number $r$. Its odds are differences, and around a circle they cancel:
# $(r_A-r_B)+(r_B-r_C)+(r_C-r_A)=0$. The judge's add up to nine nats. So any reward is wrong on at least one of the three
# comparisons. Here a Bradley–Terry model learns from 8,000 pairs of the data, with labels drawn from the circular judge. Its
# odds are averages over held-out answers in which only the opener is exchanged.

# %%
torch.manual_seed(0)
relabelled = []
for example, (x, chosen, rejected, _) in zip(examples[:8000], train_pairs[:8000], strict=True):
    golds = torch.tensor([[gold(x, chosen), gold(x, rejected)]])  # (1, 2)
    openers = torch.tensor([[opener_of(chosen), opener_of(rejected)]])
    if torch.rand(1) > circular_judge(golds, openers):
        example = example._replace(chosen=example.rejected, rejected=example.chosen)
    relabelled.append(example)
with tempfile.TemporaryDirectory() as folder:
    sft.save_pretrained(folder)
    bt_model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
one_pass = p3o.Config(**p3o.SMALL | dict(epochs=1))
p3o.train_reward(bt_model, relabelled, one_pass, recorder([]))

lines = []
kinds = judge.KIND_OPENERS
for own, other in zip(kinds, [kinds[1], kinds[2], kinds[0]], strict=True):
    exchanged = []
    for pair in heldout_pairs:
        if opener_of(pair.chosen) < 3:
            rest = pair.chosen.split(kinds[opener_of(pair.chosen)])[1]
            exchanged.append(pair._replace(chosen=f" {own}{rest}", rejected=f" {other}{rest}"))
    swapped = tokenize(exchanged, tokenizer, cfg.prompt_tokens, cfg.response_tokens)
    with torch.no_grad():
        scores = p3o.score_pairs(bt_model, swapped).double()  # (M, 2)
    lines.append([f"{own} over {other}", 3.0, (scores[:, 0] - scores[:, 1]).mean().item()])
total = sum(line[2] for line in lines)
table(["odds in nats", "judge", "reward model"], [*lines, ["sum", 9.0, total]])
assert abs(total) < 1e-5 and max(abs(line[2]) for line in lines) < 1

# %%
p3o.set_gain(bt_model, sft, prompts[: p3o.GAIN_PROMPTS], cfg)
_, _, openers = learn(lambda ids, mask: p3o.reward_scores(bt_model, ids, mask), beta=cfg.beta)
lines = []
for name, shares in (
    ("judge, β = 0.05, last five iterations", circled[0.05][-5:].mean(0)),
    ("judge, β = 0.05, average of all", circled[0.05].mean(0)),
    ("judge, β = 0.2, last five iterations", circled[0.2][-5:].mean(0)),
    ("reward model, last five iterations", shares_of(openers[-5:].flatten())),
):
    lines.append([name, *shares.tolist(), counter(shares)])
table(["shares of the openers", *judge.KIND_OPENERS, "best counter wins"], lines)
assert lines[1][-1] < lines[0][-1] and lines[2][-1] < 0.65

often = torch.ones(3, 3).double()  # how often each pair was labelled, in a table of three answers
often[[0, 1], [1, 0]] = 9.0  # the first two nine times as often
r_three = torch.zeros(3).double()
for _ in range(500):
    r_three.requires_grad_()
    fit = (often * P_rps * F.logsigmoid(r_three[:, None] - r_three)).sum()
    r_three = (r_three + 0.1 * torch.autograd.grad(fit, r_three)[0]).detach()
shares = (even + r_three / 0.1).softmax(0)  # the optimum of section 7
print()
odds_of_r = (r_three - r_three.roll(-1)).tolist()  # 1 over 2, 2 over 3, 3 over 1
lines = [["r, odds over the next", *odds_of_r], ["policy", *shares.tolist()]]
table(["uneven labels", "1", "2", "3"], lines)
print(f"best counter wins {counter(shares):.2f}")
assert counter(shares) > 0.9

# %% [markdown]
# Each opener wins as often as it loses. So the reward model sees hardly any difference, and is off by more than two nats on
# all three comparisons. The small odds that are left over are an accident of the labels, and the policy follows them.
#
# The second table shows what such accidents can do. In three answers without a language model, the first two were labelled
# nine times as often as the other pairs. Now the reward has a clear favourite, and the policy gives nothing else. The third
# answer beats it at odds of three nats. P3O with a judge does not depend on such counts, because it asks about the policy's own
# pairs. Its last policy at the low β is easy to beat as well. The average over the run is harder to beat, and so is β = 0.2.
#
# **Think.** PPO could draw a second answer, ask the judge, and take $P(y_1\succ y_2)-\tfrac12$ as the reward of $y_1$. Would
# that work?
#
# <details><summary>Answer</summary>
#
# Yes: its expected step, $\mathbb E[\Delta r\,g_1]$, is the second form in the proof above. But that is a pairwise method that
# throws half of each comparison away: $y_2$ was sampled and judged, and gets no gradient.
# </details>
#
# ### Ask twice
#
# In practice the judge is a language model, and it often favours the answer that it reads first. This is *position bias*.
# Let $B(y_1,y_2)$ be the probability with which it prefers $y_1$ when $y_1$ comes first. The usual remedy is to ask twice,
# once in each order, and to take $\bar P=\tfrac12\big(B(y_1,y_2)+1-B(y_2,y_1)\big)$. What does P3O lose without it?
#
# On average, nothing. Both answers are drawn alike, so $(y_1,y_2)$ and $(y_2,y_1)$ are equally likely. The mean of the two steps
# is $\tfrac12\cdot\tfrac12\big(B(y_1,y_2)-B(y_2,y_1)\big)(g_1-g_2)=\tfrac12\big(\bar P-\tfrac12\big)(g_1-g_2)$. **So asking once
# has the expected step of asking twice, whatever the bias is.** Three costs remain.
#
# - *Variance.* If $B=P+b$, the step gains $\tfrac12b\,(g_1-g_2)$. Its mean is 0, and it adds exactly
#   $\tfrac12b^2\,\mathbb E\|\nabla\log\pi\|^2$ to the variance.
# - *The clip.* It looks at the sign of $q$, and the bias can flip it. So the average is exact only without clipping, or on fresh pairs.
# - *The judge itself.* If the bias adds $b$ nats to the odds $z$, then $\bar P=\tfrac12\big(\sigma(z+b)+\sigma(z-b)\big)$. That ranks
#   the answers as $\sigma(z)$ does, but close pairs count less: $4\,\sigma(b)\,\sigma(-b)=0.42$ times as much at $b=2$. β is then
#   too strong. Asking twice does not repair this.


# %%
def twice(B):
    "The judge asked in both orders."
    return 0.5 * (B + 1 - B.T)


p_here = start.exp()
g_here = torch.eye(5).double() - p_here  # (Y, Y): row y is ∇log π(y)
apart = (g_here[:, None] - g_here).flatten(0, 1)  # (Y², Y): g_1 − g_2
likely = torch.outer(p_here, p_here).flatten()  # (Y²,)
z = P_five.logit()
judges = {"no bias": P_five, "+0.2 on P": P_five + 0.2, "+2 nats on the odds": torch.sigmoid(z + 2)}
judges["the same, asked twice"] = twice(judges["+2 nats on the odds"])
found = {}
for name, B in judges.items():
    step = judged_step(B, start, ref_five, 0.0)
    both_orders = judged_step(twice(B), start, ref_five, 0.0)
    assert torch.allclose(step, both_orders, atol=1e-15)
    clipped = [judged_step(each, start, ref_five, 0.0, far, "joint") for each in (B, twice(B))]
    pulls = 0.5 * (B - 0.5).flatten()[:, None] * apart  # (Y², Y)
    noise = (likely @ (pulls - step).square().sum(1)).item()  # the variance of one pair's step
    found[name] = [step.norm().item(), noise, (clipped[0] - clipped[1]).norm().item()]
head = ["judge", "length of the step", "variance", "older pairs, V2: once − twice"]
table(head, [[name, *values] for name, values in found.items()])
more = found["+0.2 on P"][1] - found["no bias"][1]
assert math.isclose(more, 0.5 * 0.2**2 * (p_here @ g_here.square().sum(1)).item())
assert found["+2 nats on the odds"][0] < found["no bias"][0]
assert found["+2 nats on the odds"][2] > 1e-3 > 1e-15 > found["the same, asked twice"][2]


# %%
def biased(golds, openers):
    "The gold judge with two nats in favour of the first answer."
    return torch.sigmoid(golds[:, 0] - golds[:, 1] + 2)


def biased_twice(golds, openers):
    return 0.5 * (biased(golds, openers) + 1 - biased(golds.flip(1), openers))


against_sft = torch.stack([judged_golds[:, 0], sft_golds[:, 0]], 1)  # (256, 2): the policy first
lines = []
for name, says, golds in (
    ("no bias", gold_judge, judged_golds),
    ("2 nats, asked once", biased, golds_of(learn(ask(biased))[0])),
    ("2 nats, asked twice", biased_twice, golds_of(learn(ask(biased_twice))[0])),
):
    verdicts = [says(pair, None).mean().item() for pair in (against_sft, sft_golds)]
    lines.append([name, golds.mean().item(), *verdicts])
head = ["judge", "gold reward after training", "its verdict: policy, then SFT", "SFT, then SFT"]
table(head, lines)
_, once, both = lines
assert min(once[1], both[1]) > sft_golds.mean() + 2, "each learns"
assert once[3] > 0.65 and abs(both[3] - 0.5) < 0.05, "the same policy on both sides"

# %% [markdown]
# Training hardly notices whether the judge is asked once or twice: the policies are about equally good. (One run each; do not
# read more into the differences.) **The evaluation does notice.** There the policy's answer always comes first. Asked once,
# the judge even says that SFT's answers win clearly against SFT's answers. Asked twice, it says one half. So ask twice
# whenever the two sides are not drawn alike: in a win rate, or in pairs with one answer of another model. In P3O it only
# lowers the variance, at twice the price.
#
# **Think.** Many judges return a verdict, not a probability: 1 with probability $P(y_1\succ y_2)$, else 0. May `score` return
# the verdict minus ½?
#
# <details><summary>Answer</summary>
#
# Yes. The step is linear in the verdict, and the verdict's mean is $P$. So the expected step is the same, with more variance. The
# clip is the only part that is not linear, as with position bias.
# </details>
