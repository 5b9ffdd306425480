"""Text and code to measure models on. Fixed, so that figures can be compared over time."""

PROSE = """\
The mill at the bend of the river had stood idle for eleven years when Marta bought it, and nobody in the village could
say what she meant to do with it. The wheel was gone, sold for scrap after the flood, and the race was choked with
willow. On the first morning she walked the length of the leat with a notebook, measuring the fall of the water with a
bottle half full of tea laid on a plank. By noon she had a figure, two metres and thirty centimetres, and she wrote it
on the wall above the door with a piece of chalk.

A head of two metres is not much. A cubic metre of water weighs a tonne, and a tonne that falls two metres gives up
about twenty kilojoules, enough to boil the water for a small pot of coffee. But the river brought four hundred litres
every second, day and night, in summer a little less and in March a good deal more, and that made eight kilowatts before
anything was lost. Even with an old machine and bad bearings half of it would reach the wires. She did the sum three
times, because she did not trust a number that pleased her.

The council sent a young man with a form. He wanted to know about fish. Trout, she told him, could go up the old ladder
on the left bank if somebody cleared it, and she would clear it. Eels were harder. Eels go down to the sea in autumn, on
dark nights after rain, and a turbine that turns quickly will cut them. So the turbine must turn slowly, and there must
be a screen with bars no more than ten millimetres apart, and in October somebody must rake the leaves from the screen
every four hours. The young man wrote all of this down. He had expected to be shouted at.

In the second winter the screw arrived on a lorry that was too long for the bridge. They turned it with a farm tractor
and a great deal of advice. It was a plain thing, a steel spiral in a trough, the same shape that lifted water for
gardens two thousand years ago, only run the other way: the water comes down and the shaft goes round. When the sluice
was opened for the first time the screw did nothing at all for a moment. Then it shook itself, like a dog that has been
called, and began to turn, and the lamp over the door came on, first red, then yellow, then a white that made everyone
look at the snow.

People ask whether it pays. The honest answer is that it depends on what you count. The interest on the loan is larger
than the cheque from the power company in a dry year and smaller in a wet one, and there have been more dry years than
wet ones lately. But the school is heated from the river now, and the ladder brings trout up to the pool under the
church, where children lie on their stomachs to watch them. On the wall above the door the figure is still there, a
little paler, and below it, in another hand: not bad for a bottle of tea.
"""

CODE = '''\
import heapq
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(order=True)
class Entry:
    distance: float
    name: str = field(compare=False)


class Graph:
    """A directed graph with non-negative weights."""

    def __init__(self):
        self.edges = defaultdict(list)

    def add_edge(self, source, target, weight):
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self.edges[source].append((target, weight))

    def shortest_path(self, start, goal):
        """Return (distance, path) by Dijkstra's algorithm, or None if goal cannot be reached."""
        best = {start: 0.0}
        previous = {}
        queue = [Entry(0.0, start)]
        while queue:
            entry = heapq.heappop(queue)
            if entry.distance > best[entry.name]:
                continue  # an older, longer way to the same place
            if entry.name == goal:
                path = [goal]
                while path[-1] != start:
                    path.append(previous[path[-1]])
                return entry.distance, path[::-1]
            for target, weight in self.edges[entry.name]:
                distance = entry.distance + weight
                if distance < best.get(target, float("inf")):
                    best[target] = distance
                    previous[target] = entry.name
                    heapq.heappush(queue, Entry(distance, target))
        return None


/* Sum of an array with Kahan's correction. */
float kahan_sum(const float *x, size_t n) {
    float sum = 0.0f, carry = 0.0f;
    for (size_t i = 0; i < n; ++i) {
        float y = x[i] - carry;
        float t = sum + y;
        carry = (t - sum) - y;
        sum = t;
    }
    return sum;
}

SELECT customer.name, COUNT(*) AS num_orders, SUM(item.price * item.quantity) AS total
FROM customer
JOIN purchase ON purchase.customer_id = customer.id
JOIN item ON item.purchase_id = purchase.id
WHERE purchase.created_at >= '2024-01-01'
GROUP BY customer.name
HAVING SUM(item.price * item.quantity) > 100
ORDER BY total DESC
LIMIT 20;

#!/bin/sh
set -eu
for file in "$@"; do
    case $file in
        *.tar.gz) tar -xzf "$file" ;;
        *.zip) unzip -q "$file" ;;
        *) echo "unknown archive: $file" >&2; exit 1 ;;
    esac
done

{"name": "example", "version": "1.4.2", "scripts": {"build": "tsc -p .", "test": "jest --coverage"}, "private": true}
'''
